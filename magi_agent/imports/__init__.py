"""What other programs' configuration says, as runtime settings, with a report of what could not be carried over."""
