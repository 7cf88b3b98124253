"""The tokenizer and the network that a step trains. In the order of use: hub (where they lie), tokenizer,
architecture (what a config tells), loading (the network), recomputation (with tiled_mlp and
activation_offload), attention, fused_loss and packed (the packed forward pass), scalar_head (reward models),
adapters (LoRA). one_by_one and last_layer: architectures with ways of their own; probes and miniature: how
these are found out.
"""
