"""The edge to systemd: its manager over D-Bus, transient units, the notify protocol, the journal."""
