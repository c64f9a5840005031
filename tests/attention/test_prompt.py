import pytest
import torch

from fatezero.attention.prompt import PromptEdit, align_sequences, changed_words
from fatezero.demo.video_model import build_tokenizer as build_wan_tokenizer


@pytest.fixture(scope="module")
def sentences():
    return build_wan_tokenizer()


def fed(edit: PromptEdit, columns: int = 77) -> dict[int, dict[int, float]]:
    """target column -> {source column: share}, for columns that are copied from elsewhere or shared."""
    matrix = edit.align(columns, columns).matrix
    return {j: {int(i): float(matrix[i, j]) for i in matrix[:, j].nonzero()[:, 0]} for j in range(columns)}


def test_refine_copies_shared_tokens_and_leaves_new_ones(tokenizer):
    edit = PromptEdit("a red circle on sand", "watercolor painting of a red circle on sand", tokenizer)
    got = fed(edit)
    assert [got[j] for j in range(4)] == [{0: 1.0}, {}, {}, {}]
    assert [got[j] for j in range(4, 9)] == [{i: 1.0} for i in range(1, 6)]
    assert got[9] == {6: 1.0}, "the end mark follows the prompt"
    assert all(got[j] == {j: 1.0} for j in range(10, 77)), "padding keeps its place"


def test_refine_of_a_changed_word_keeps_the_targets_own_column(tokenizer):
    edit = PromptEdit("a red circle on sand", "a blue circle on sand", tokenizer)
    alignment = edit.align(77, 77)
    assert alignment.copied[2] == 0
    assert alignment.copied.sum() == 76


def test_replace_maps_a_changed_word_to_its_place(tokenizer):
    got = fed(PromptEdit("a red circle on sand", "a blue square on sand", tokenizer, mode="replace"))
    assert all(got[j] == {j: 1.0} for j in range(77))


def test_replace_spreads_a_word_over_words_of_several_tokens(tokenizer):
    # "jeep" is four letters, so four tokens here; "car" three; "red" one.
    edit = PromptEdit("a red circle", "a car circle", tokenizer, mode="replace")
    got = fed(edit)
    assert [got[j] for j in (2, 3, 4)] == [{2: pytest.approx(1 / 3)}] * 3
    assert got[5] == {3: 1.0}, "words after the longer one map to themselves"
    assert got[6] == {4: 1.0}, "and so does the end mark"
    edit = PromptEdit("a jeep circle", "a car circle", tokenizer, mode="replace")
    assert fed(edit)[2] == {i: pytest.approx(1 / 3) for i in (2, 3, 4, 5)}


def test_replace_needs_equal_word_counts(tokenizer):
    with pytest.raises(ValueError, match=r"2 words.*3"):
        PromptEdit("a circle", "a red circle", tokenizer, mode="replace")


def test_repeated_words_are_found_at_every_place(tokenizer):
    prompt = "a red circle and a red star on sand"
    edit = PromptEdit(prompt, prompt, tokenizer, blend_words=(["red"], ["a"]), reweight={"red": 3.0})
    assert edit.blend_tokens(77, 77) == ([2, 6], [1, 5])
    assert edit.align(77, 77).weights.nonzero()[:, 0].tolist() == list(range(77))
    assert (edit.align(77, 77).weights == 3.0).nonzero()[:, 0].tolist() == [2, 6]


def test_words_match_without_case_and_punctuation_and_as_phrases(tokenizer):
    edit = PromptEdit("a red circle, on sand", "a red circle, on sand", tokenizer, blend_words=(["Red Circle"], []))
    source, target = edit.blend_tokens(77, 77)
    assert source == [2, 3, 4], "the comma belongs to its word"
    assert target == []


@pytest.mark.parametrize("mode", ["refine", "replace"])
@pytest.mark.parametrize(
    "target",
    [
        "a green square on water.",
        "a green square, on water",
        'A Green square on  "water"',
        "a \u201cgreen\u201d square \u2014 on (water)!",
        "a green SQUARE - on\u00a0'water'...",
        "a green square\non water",
    ],
)
def test_punctuation_in_one_prompt_does_not_change_words(tokenizer, sentences, target, mode):
    source, words = "a red square on water", ["a", "green", "square", "on", "water"]
    for pair in ((source, target), (target, source)):
        of_source, of_target = changed_words(*pair)
        assert {*map(str.lower, of_source + of_target)} == {"red", "green"}
    for tokens in (tokenizer, sentences):
        edit = PromptEdit(source, target, tokens, mode)
        matrix, columns = edit.align(77, 77).matrix, edit.columns
        for word in words if mode == "replace" else [word for word in words if word != "green"]:
            of = "red" if word == "green" else word
            row = edit.token_indices(source, of, 77)
            assert matrix[row].sum() == len(row), f"all of {of}'s attention reaches {word}"
            assert matrix[row][:, edit.token_indices(target, word, 77)].sum() == len(row)
        ids = [token for word in edit.word_tokens(target) for token in word]
        fed_ids = {token for i, token in enumerate(ids) if matrix[:, columns.of(i)].any()}
        if tokens is tokenizer:
            shared = words if mode == "replace" else ["a", "square", "on", "water"]
            assert fed_ids == set(tokenizer(" ".join(shared), add_special_tokens=False).input_ids), "no punctuation"


@pytest.mark.parametrize(
    ("source", "target", "changed"),
    [
        ("a red-white cube", "a red\u2013white ball", (["cube"], ["ball"])),
        ("a caf\u00e9, it's red", "a cafe\u0301 it\u2019s blue", (["red"], ["blue"])),
        ("a red square - on water", "a red square on water", ([], [])),
        ("a 50% cube", "a 5% cube", (["50%"], ["5%"])),
    ],
)
def test_words_are_compared_after_normalisation(source, target, changed):
    assert changed_words(source, target) == changed


@pytest.mark.parametrize(
    "options",
    [{"reweight": {"jeep": 2.0}}, {"blend_words": (["jeep"], [])}, {"blend_words": (["red"], ["jeep"])}],
)
def test_a_word_not_in_the_prompt_is_named(tokenizer, options):
    with pytest.raises(ValueError, match=r"'jeep' is not in the prompt"):
        PromptEdit("a red circle", "a blue circle", tokenizer, **options)


@pytest.mark.parametrize("options", [{"mode": "swap"}, {"blend_words": ("red", "blue")}, {"reweight": {"blue": -1}}])
def test_other_wrong_options_are_named(tokenizer, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PromptEdit("a red circle", "a blue circle", tokenizer, **options)


def test_reweighting_multiplies_the_fused_column_without_renormalising(tokenizer):
    edit = PromptEdit("a red circle", "a red circle", tokenizer, reweight={"red": 10.0})
    of_source, of_own = edit.align(77, 77).values(torch.eye(77))
    expected = torch.eye(77)
    expected[2, 2] = 10
    assert torch.equal(of_source, expected)
    assert not of_own.any()


def test_prompts_beyond_77_tokens_use_further_blocks(tokenizer):
    source = " ".join(["red"] * 74 + ["circle", "star"])
    target = " ".join(["red"] * 74 + ["circle", "square"])
    edit = PromptEdit(source, target, tokenizer, blend_words=(["star"], ["square"]))
    # 75 content tokens fill the first block; the next starts at column 77 with a start mark.
    assert edit.blend_tokens(154, 154) == ([78], [78])
    alignment = edit.align(154, 154)
    assert alignment.copied[78] == 0
    assert alignment.copied.sum() == 153
    with pytest.raises(ValueError, match=r"beyond the 77 tokens"):
        edit.blend_tokens(77, 77)


def test_a_longer_target_than_source_embedding(tokenizer):
    edit = PromptEdit("a red circle", " ".join(["a red circle"] + ["sand"] * 80), tokenizer)
    alignment = edit.align(77, 154)
    assert alignment.matrix.shape == (77, 154)
    assert alignment.copied[77:154].sum() <= 1, "only the end mark is in the second block"


def test_alignment_of_sequences_is_global():
    assert align_sequences([1, 2, 3], [9, 1, 2, 3]) == [(0, 1), (1, 2), (2, 3)]
    assert align_sequences([1, 2, 3], [1, 3]) == [(0, 0), (2, 1)]
    assert align_sequences([1, 2], [3, 4]) == []


def test_describe_names_the_source_of_every_word(tokenizer):
    edit = PromptEdit("a red circle", "a blue circle", tokenizer)
    assert edit.describe().splitlines() == ["a <- a", "blue <- (new)", "circle <- circle"]


# --- T5's layout ----------------------------------------------------------------------------


def test_t5_has_content_then_one_end_token_then_equal_padding(sentences):
    pair = PromptEdit("a red circle on grass", "a blue striped circle on grass", sentences)
    assert pair.token_indices(pair.target, "striped", 32) == [2]
    found = pair.align(32, 40)
    source, target = (sentences(text).input_ids for text in (pair.source, pair.target))
    assert [source[i] for i in found.matrix[:, :6].argmax(0).tolist()][3:] == target[3:6], "shared words meet"
    assert found.copied[:7].tolist() == [1, 0, 0, 1, 1, 1, 1], "blue and striped are new"
    assert found.matrix[5, 6] == 1, "end meets end"
    assert found.matrix[:, 6].sum() == 1
    padding = found.matrix[6:, 7:]
    assert torch.allclose(padding, torch.full_like(padding, 1 / 33))
    assert found.matrix[6:, :7].sum() == 0 and found.matrix[:6, 7:].sum() == 0


def test_the_sources_attention_to_padding_goes_to_the_targets_padding(sentences):
    """Padding tokens have one key and value; what counts is the sum of the attention to them."""
    pair = PromptEdit("a red circle on grass", "a red circle", sentences)
    found = pair.align(16, 16)
    attention = torch.rand(1, 1, 5, 16).softmax(-1)
    fused = found.fused(attention, torch.zeros(1, 1, 5, 16))
    assert torch.allclose(fused[..., 4:].sum(-1), attention[..., 6:].sum(-1))


def test_words_of_several_tokens_and_words_beyond_the_text(sentences):
    pair = PromptEdit("a jeep on grass", "a Porsche on grass", sentences)
    assert pair.token_indices(pair.source, "jeep", 16) == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="beyond the 3 tokens"):
        pair.token_indices(pair.source, "jeep", 3)
    assert pair.wordless(pair.source, 12) == [9, 10, 11]
