"""The merge rules, one file a rule or a close family; `pave_lightning.merging` gathers them."""
