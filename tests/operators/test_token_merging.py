"""Token merging against a loop over tokens, and its destinations."""

import pytest
import torch

from vision_attn.operators.token_merging import Groups, destinations, group

CPU = torch.device("cpu")


def looped(similarity, destination, number):
    """Groups of one sample as lists of tokens, by the definition of token merging."""
    others = [token for token in range(len(similarity)) if token not in destination]
    cosines = torch.nn.functional.cosine_similarity(
        similarity[others][:, None], similarity[destination][None], dim=-1, eps=0
    )
    best, nearest = cosines.max(1)
    merged = sorted(range(len(others)), key=lambda i: -best[i].item())[:number]
    groups = [[token] for token in destination]
    for i in merged:
        groups[nearest[i]].append(others[i])
    return groups + [[others[i]] for i in range(len(others)) if i not in merged]


@pytest.mark.parametrize("number", [0, 7, 20])
def test_groups_are_those_of_the_definition(number):
    torch.manual_seed(0)
    similarity, x = torch.randn(2, 26, 5, dtype=torch.float64), torch.randn(2, 26, 3, 4, dtype=torch.float64)
    destination = [3, 4, 9, 17, 20, 25]
    groups = group(similarity, torch.tensor(destination), (number,))[0]
    merged = groups.merge(x)
    assert merged.shape == (2, 26 - number, 3, 4)
    restored = groups.unmerge(merged)
    for sample in range(2):
        for tokens in looped(similarity[sample], destination, number):
            expected = x[sample, tokens].mean(0)
            for token in tokens:
                torch.testing.assert_close(restored[sample, token], expected)


def test_further_merging_goes_on_where_less_ended():
    similarity = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(1))
    some, more = group(similarity, torch.arange(0, 30, 6), (5, 21))
    for i, j in torch.combinations(torch.arange(30)).tolist():
        together = some.index[:, i] == some.index[:, j]
        assert (more.index[:, i] == more.index[:, j])[together].all()


def test_destinations_are_one_per_whole_cell():
    assert destinations((5, 7), (2, 3), False, CPU).tolist() == [0, 3, 14, 17]
    assert destinations((2, 2, 3), (2, 3), False, CPU).tolist() == [0, 6]
    assert destinations((7,), (1, 3), False, CPU).tolist() == [0, 3]


def test_random_destinations_reach_every_token_of_their_cell():
    torch.manual_seed(0)
    drawn = torch.stack([destinations((5, 7), (2, 3), True, CPU) for _ in range(200)])
    assert drawn[:, 0].unique().tolist() == [0, 1, 2, 7, 8, 9]
    assert drawn[:, 3].unique().tolist() == [17, 18, 19, 24, 25, 26]


def test_means_of_half_precision_are_summed_in_float32():
    groups = Groups(torch.zeros(1, 4096, dtype=torch.long), 1)
    x = torch.full((1, 4096, 1), 0.1, dtype=torch.bfloat16)
    assert torch.equal(groups.merge(x), x[:, :1])


def test_gradient():
    groups = group(torch.randn(1, 9, 3), torch.tensor([0, 5]), (4,))[0]
    x = torch.randn(1, 9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: groups.unmerge(groups.merge(x)), x)
