"""Several processes that train together: the group, how it is started, and who watches it."""
