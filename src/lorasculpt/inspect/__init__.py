"""What an adapter is made of: `lora` of a plain LoRA, `update` of one that changes the forward pass; `plots` draws."""
