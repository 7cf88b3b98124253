"""The tokenizer and the network that a step trains: hub (where they lie), tokenizer, architecture (what a config
tells), loading (the network), attention and losses (the packed forward pass), scalar_head (reward models),
adapters (LoRA). one_by_one and last_layer: architectures with ways of their own; miniature: how to find out."""
