"""The model "jaxwna16" of lm-evaluation-harness 0.4.13; importing this registers it there.

    from jaxwna16.lm_eval import JaxWNA16LM

    lm_eval.simple_evaluate(model=JaxWNA16LM("path/to/checkpoint"), tasks=["wikitext"])

or `jaxwna16 lm-eval --model_args pretrained=DIR --tasks wikitext`. It needs the extra `eval` and no
torch, and `import jaxwna16` does not import it.
"""

from jaxwna16.evaluation.lm_eval.model import JaxWNA16LM as JaxWNA16LM
