"""What this process runs on: processors, memory, disk, device, signals."""
