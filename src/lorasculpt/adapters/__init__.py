"""The only part that knows the inside of PEFT: registration, masked leaves, the clock, files."""
