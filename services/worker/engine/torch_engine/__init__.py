"""Our reference engine: Llama-family models in PyTorch, with nothing hidden in a library.

``engine`` starts a rank, ``rank_part`` puts it together. The leading rank (``leader``) runs a step
through ``batch_scheduler`` (which tokens), ``step_plan`` (what followers are told), ``pipeline``
(the steps under way), ``sampling`` (which token) and ``stopping`` (is it the end); every rank runs
``rank_runner``: ``batch`` (index arrays) and ``model`` (one pass over its layers and heads).
``sharding`` says which part of which tensor a rank holds, for weights and KV cache alike;
``checkpoint``, ``loading`` and ``weights`` fill it. ``ranks`` connects the ranks.
``config``, ``make_model``, ``batch_scheduler``, ``kv_cache`` and ``sharding`` need no torch.
"""
