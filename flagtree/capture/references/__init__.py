"""Definitions of models that transformers lacks, one file each, under the names that their public checkpoints use.

Each file has `layer_kinds(config)`, the kind of each decoder layer; `build(config, numbers, vision)`, the model with the decoder layers of
those numbers (or, for `vision`, as many blocks of its tower, without the text); and `CHECKPOINT`, what its weights are called there.
A model is called as transformers calls one; `see(...)` is its tower with the bridge.
"""
