"""Named sets of enabled models with their settings."""
