"""Finding models in folders, and saying what each one is."""
