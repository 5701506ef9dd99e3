"""The model: its sizes, tokenizer, weights, decoder, and LoRA adapters beside it.

model.py           a model: config, parameters and tokenizer
config.py          sizes and switches of a decoder; the families
rope_settings.py   what a Hugging Face config says about rope, in either spelling
known_models.py    the sizes of well-known models
transformer.py     the decoder
attention.py       attention: XLA, cuDNN, splash
rope.py            rotary position embeddings
kv_cache.py        keys and values of what was read and written
logits.py          logits, and log-probabilities of the next tokens
divergence.py      how far next tokens are from those of a teacher
lora.py            adapters as pytrees
lora_product.py    the two thin products of many adapters
own_kernels.py     a model of its own for each of several sequences
quantize.py        a frozen base as int8 or nf4
turned_kernels.py  kernels as a CPU wants them for few tokens
tokenizer.py       text to token ids and back
tokenizer_folder.py reads a tokenizer's files
byte_tokenizer.py  bytes as tokens
chat_template.py   chat templates: how a model is asked, and how its answer is written
thoughts.py        what a reasoning model writes before its text
gguf_tokenizer.py  tokenizers from a GGUF file
names.py           what every parameter is called: here, by Hugging Face, in GGUF
weights.py         safetensors in and out
tensor_file.py     one safetensors file
gguf.py            models from a GGUF file
gguf_file.py       GGUF files on disk: headers and parts
packages.py        models inside installed packages
place_params.py    from the host to the devices, one parameter at a time
mesh_fit.py        whether a mesh divides a model
padded_lengths.py  the lengths that texts are padded to
toys/              tiny models, trained on the spot
"""

import importlib

_ELSEWHERE = {"load_model": "sources", "Model": "models.model", "TINY": "models.known_models"}


def __getattr__(name: str):
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'seal_jax.models' has no attribute {name!r}")
    return getattr(importlib.import_module(f"seal_jax.{_ELSEWHERE[name]}"), name)
