"""The DocVQA script as if bitsandbytes could count few of a tensor's elements: the weights' group is divided."""

import common.training
import finetune_hf_trainer_docvqa as docvqa

if __name__ == "__main__":
    common.training.BITSANDBYTES_MOST = 300_000  # the built-in checkpoint trains more
    docvqa.run(docvqa.main)
