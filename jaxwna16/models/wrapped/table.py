"""The wrappers: a row for each `model_type` whose text model is one of several parts."""

from __future__ import annotations

import dataclasses

from jaxwna16.models.wrapped.wrapper import Wrapper

_INSIDE = {r"^model\.language_model\.": "model."}
"""The text model beside others is `model.language_model`, alone it is `model`."""
_LLAVA = {
    r"^language_model\.lm_head(?=\.|$)": "lm_head",
    r"^(model\.language_model|language_model\.model)\.": "model.",
}
"""Published files have a whole causal model as a part, transformers 5 has the head outside."""
_KIMI = {**_LLAVA, r"^model\.blocks\.(?=\d)": "model.layers."}
"""transformers 5 saves the layers of Kimi K2.5 as those of its tower."""
_THINKER = {r"^thinker\.": "", **_INSIDE}
"""A thinker alone, or beside what speaks."""
_ANY = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
_QWEN = {"image": 151655, "video": 151656}

_QWEN3_5 = Wrapper(
    texts=("qwen3_5_text",), names=_INSIDE, tokens={"image": 248056, "video": 248057}
)
_QWEN3_VL = Wrapper(texts=("qwen3_vl_text",), names=_INSIDE, tokens=_QWEN)
_QWEN2_VL = Wrapper(
    texts=("qwen2_vl_text",), is_flat=True, names=_INSIDE, tokens=_QWEN, asks_text=True
)
_OMNI = Wrapper(texts=("qwen2_5_omni_text",), names=_THINKER, tokens={**_QWEN, "audio": 151646})
_OMNI_MOE = dataclasses.replace(_OMNI, texts=("qwen3_omni_moe_text",))
_GEMMA4 = Wrapper(
    texts=("gemma4_text",),
    names=_INSIDE,
    tokens={"image": 258880, "video": 258884, "audio": 258881},
    is_tied=True,
)
_WHOLE = ("thinker_config", "text_config")
_GLM4V_MOE = Wrapper(
    texts=("glm4v_moe_text",),
    names=_INSIDE,
    tokens={"image": 151363, "video": 151364},
    asks_text=True,
)
_ONE_IMAGE = Wrapper(texts=_ANY, names=_LLAVA, tokens={"image": 32000})

WRAPPERS = {
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": dataclasses.replace(_QWEN3_5, texts=("qwen3_5_moe_text",)),
    "qwen2_vl": _QWEN2_VL,
    "qwen2_5_vl": dataclasses.replace(_QWEN2_VL, texts=("qwen2_5_vl_text",)),
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": dataclasses.replace(_QWEN3_VL, texts=("qwen3_vl_moe_text",)),
    "mistral3": Wrapper(
        texts=("mistral", "ministral3"), names=_LLAVA, tokens={"image": 10}, is_tied=True
    ),
    "qwen2_5_omni": dataclasses.replace(_OMNI, path=_WHOLE),
    "qwen2_5_omni_thinker": _OMNI,
    "qwen3_omni_moe": dataclasses.replace(_OMNI_MOE, path=_WHOLE),
    "qwen3_omni_moe_thinker": _OMNI_MOE,
    "internvl": Wrapper(
        texts=("qwen2", "qwen3", "qwen3_moe", "llama", "mistral"),
        names=_LLAVA,
        tokens={"image": 151667},
        is_tied=True,
    ),
    "glm4v": dataclasses.replace(
        _GLM4V_MOE, texts=("glm4v_text",), tokens={"image": 151343, "video": 151344}
    ),
    "glm4v_moe": _GLM4V_MOE,
    "gemma3": Wrapper(texts=("gemma3_text",), names=_LLAVA, tokens={"image": 262144}, is_tied=True),
    "gemma4": _GEMMA4,
    "gemma4_unified": dataclasses.replace(_GEMMA4, texts=("gemma4_unified_text",)),
    "kimi_k25": Wrapper(
        texts=("deepseek_v3", "kimi_k2"),
        names=_KIMI,
        tokens={"image": 163605, "video": 163840, "media_placeholder": 163605},
        is_tied=True,
    ),
    "llava": dataclasses.replace(_ONE_IMAGE, asks_text=True),
    "llava_next": _ONE_IMAGE,
}
"""`model_type` -> its row."""
