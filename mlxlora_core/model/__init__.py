"""A model and everything that is done to it: linears, adapters, its folder, text in and out."""
