"""The network and its tokenizer, in this order: models (both, loaded), attention, losses (the packed forward
pass), scalar_head (reward models), adapters (LoRA). one_by_one and last_layer: architectures with ways of
their own."""
