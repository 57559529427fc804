"""Host-side planning: every length of a step, known before anything runs on the device."""
