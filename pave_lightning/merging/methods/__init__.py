"""The merge methods, one file a method or a close family; `pave_lightning.merging.registry` finds them."""
