"""The data's way, from rows to batches.

Read in this order: types (the map), sources and files, formats, prompt_rule (the loss mask), chat (its tokens
and labels), pairs and prompts, reader, writer and dataset (rows on disk), packing, batches.
"""
