"""Our reference engine: Llama-family models in PyTorch, with nothing hidden in a library.

A step runs through ``batch_scheduler`` (which tokens), ``batch`` (index arrays), ``model`` (one
pass), ``sampling`` (which token) and ``stopping`` (is it the end). ``sharding`` says which part of
which tensor a rank holds, for weights and KV cache alike; ``checkpoint`` and ``weights`` fill it.
``config``, ``make_model``, ``batch_scheduler``, ``kv_cache`` and ``sharding`` need no torch.
"""
