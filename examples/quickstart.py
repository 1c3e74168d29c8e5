# SPDX-License-Identifier: Apache-2.0
"""
From a dense model to a dynamic one in six calls, on a CPU, without a download: a tiny random Llama stands in for a real base.

    python examples/quickstart.py                                        # under a minute
    python examples/quickstart.py --base HuggingFaceTB/SmolLM2-135M-Instruct --max-tokens 40960
"""

import argparse
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dynamoe_hf import calibrate_budgets, convert_model, evaluate_model, train_model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="Hub id or folder; a tiny random model by default")
    parser.add_argument("--max-tokens", type=int, default=16_384, help="training tokens")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        base = args.base or tiny_base(folder / "base")

        convert_model(base, folder / "converted")
        train_model(folder / "converted", folder / "trained", max_tokens=args.max_tokens)
        calibrate_budgets(folder / "trained", budgets=[0.5, 0.75])
        for entry in evaluate_model(folder / "trained", budget=[0.5, 0.75], base=base):
            print(
                f"{entry['setting']}: mean share {entry['mean_share']:.1%}, {entry['ratio_to_dense']:.3f} of dense perplexity"
            )

        # From here on nothing but transformers is needed: the code travels with the weights.
        model = AutoModelForCausalLM.from_pretrained(folder / "trained", trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(folder / "trained", trust_remote_code=False)
        inputs = tokenizer("The with statement", return_tensors="pt")
        for budget in (0.5, 0.75):
            model.set_budget(budget)
            text = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
            print(f"budget {budget:.0%}: {tokenizer.decode(text[0])!r}")


def tiny_base(folder):
    """A random Llama of 0.3 million parameters and a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1} | {chr(c): c for c in range(2, 128)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, initializer_range=0.2, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
