"""What is put into PEFT and its models: registered types, masked leaves, the shared layer, the clock; its files."""
