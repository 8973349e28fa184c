"""Who may use which device now, and which models stay in its memory."""
