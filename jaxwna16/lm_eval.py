"""The model "jaxwna16" of lm-evaluation-harness; importing this registers it there."""

from jaxwna16.evaluation.lm_eval import JaxWNA16LM as JaxWNA16LM
