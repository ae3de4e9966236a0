"""The demo's data: painted scenes with captions that are true of them."""
