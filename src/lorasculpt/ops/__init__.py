"""Pure functions on tensors; nothing but torch is imported here."""
