"""Every model the agent knows: the facts discovery found, and the choices people made."""
