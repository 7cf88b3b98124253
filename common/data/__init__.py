"""The data's way, read in this order: types, sources, formats, chat, packing, batches."""
