"Label reduction against the published program's output."
import torch

from scaleprotoseg.transforms import reduce_labels


def test_label_reduction_matches_the_reference(golden):
    g = golden('projection')
    w, h = g['resize_size_wh'].tolist()
    labels = torch.from_numpy(g['resize_input'])[None].long()
    expected = torch.from_numpy(g['resize_output']).long()
    assert expected.shape == (h, w)
    assert torch.equal(reduce_labels(labels, (h, w))[0], expected)
    assert not torch.equal(labels[0][(torch.arange(h) * 33 // h)[:, None], torch.arange(w) * 47 // w], expected)
