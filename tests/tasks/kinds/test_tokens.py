import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from pave_lightning.errors import PaveError
from pave_lightning.tasks.data_module import TaskDataModule
from pave_lightning.tasks.kinds.tokens import token_findings


def findings(tokenizer, texts, places=None):
    ids = tokenizer(texts)["input_ids"]
    rows = pa.table({"input_ids": ids, "length": [len(row) for row in ids]})
    return token_findings(rows, tokenizer, np.arange(len(texts)) if places is None else np.asarray(places))


@pytest.fixture
def bare():
    """Without special tokens around a text."""
    backend = Tokenizer(BPE({"[PAD]": 0, "g": 1, "o": 2}, []))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", name_or_path="some/base")


def test_texts_that_are_known_are_no_matter(tokenizer):
    assert findings(tokenizer, ["good film", "bad"]) == ([], [])


def test_rows_without_tokens_are_a_problem(bare):
    problems, remarks = findings(bare, ["go", "", "go", "?"], places=[5, 7, 8, 11])
    assert problems == [
        "the tokenizer some/base makes no tokens of the text in 2 rows, first in row 7 (counted from 0); "
        "correct or leave out these rows"
    ]
    assert remarks == []


def test_texts_of_which_no_token_is_known_are_a_problem(tokenizer):
    (problem,), remarks = findings(tokenizer, ["what ever", "this is"])
    assert "knows none of the 4 tokens of the texts (all are [UNK])" in problem
    assert remarks == []


def test_texts_of_which_few_tokens_are_known_are_told(tokenizer):
    problems, (remark,) = findings(tokenizer, ["what ever this", "is good"])
    assert problems == []
    assert remark.startswith("80% of the tokens of the texts are unknown to the tokenizer")
    assert findings(tokenizer, ["what good"]) == ([], [])


def test_texts_of_which_only_special_tokens_are_left_are_told(tokenizer):
    tokenizer.cls_token, tokenizer.sep_token = "[CLS]", "[SEP]"
    problems, (remark,) = findings(tokenizer, ["good", "  ", "bad"], places=[3, 4, 9])
    assert problems == []
    assert remark == "only special tokens are left of the text in row 4 (counted from 0)"


def test_a_data_module_refuses_such_rows_and_keeps_nothing(bare, make_task, tmp_path):
    rows = [{"text": "go", "label": 0}, {"text": "?", "label": 1}]
    options = {"seed": 0, "cache_dir": tmp_path / "cache", "batch_size": 4}
    module = TaskDataModule(make_task(train=rows), bare, **options)
    with pytest.raises(
        PaveError, match=r"task 'toy', train split \(.*train.jsonl\): .* no tokens .* in row 1 \(counted"
    ):
        module.dataset("train")
    assert list((tmp_path / "cache" / "encoded").iterdir()) == []


def test_a_tokenizer_that_cannot_encode_is_told(make_task, tmp_path):
    broken = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0})), pad_token="[PAD]")
    options = {"seed": 0, "cache_dir": tmp_path / "cache", "batch_size": 4}
    with pytest.raises(PaveError, match="cannot encode some of the texts"):
        TaskDataModule(make_task(), broken, **options).dataset("train")


def test_a_data_module_tells_what_is_odd(tokenizer, make_task, tmp_path):
    options = {"seed": 0, "cache_dir": tmp_path / "cache", "batch_size": 4}
    rows = [{"text": "good what ever this", "label": 0}, {"text": "is", "label": 1}]
    module = TaskDataModule(make_task(train=rows), tokenizer, **options)
    (remark,) = module.encoded.remarks("train")
    assert remark.startswith("task 'toy', train split (")
    assert "80% of the tokens" in remark
