import pytest
import torch

from vlm.errors import CapabilityError
from vlm.models import Classifier, ClassifierConfig, EncoderConfig, EncoderModel, VideoMambaConfig

VISION = VideoMambaConfig(
    width=32, depth=2, num_frames=4, image_size=28, patch_size=7, state_size=4, pool_norm=False, init="mamba"
)
VIDEO = torch.zeros(2, 4, 3, 28, 28)


@pytest.fixture
def models():
    return {
        "classifier": Classifier(ClassifierConfig(vision=VISION, num_classes=5), name="c"),
        "encoder": EncoderModel(EncoderConfig(vision=VISION), name="e"),
    }


def test_a_classifier_gives_logits_and_learns(models):
    model = models["classifier"].train()
    digits = torch.nn.functional.one_hot(torch.tensor([0, 3]), 4).float()
    video = digits[:, :, None, None, None].expand(2, 4, 3, 28, 28)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    labels = torch.tensor([1, 4])
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(video), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(model.eval()(video).argmax(1), labels)


@pytest.mark.parametrize("kind", ["classifier", "encoder"])
def test_both_kinds_encode_video(models, kind):
    model = models[kind].eval()
    features = model.encode_video(torch.randn_like(VIDEO))
    assert features.tokens.shape == (2, 64, 32) and features.pooled.shape == (2, 4, 32)
    assert features.embedding.shape == (2, 32)
    assert (features.embedding.norm(dim=-1) <= 1.0001).all()
    assert model.preprocessing.num_frames == 4 and model.preprocessing.image_size == 28


@pytest.mark.parametrize("kind", ["classifier", "encoder"])
def test_what_a_kind_lacks_is_an_error_that_names_it(models, kind):
    model = models[kind]
    calls = {
        "encode text": lambda: model.encode_text(["a"]),
        "search": lambda: model.similarity(torch.zeros(1, 2), torch.zeros(1, 2)),
        "match": lambda: model.match(VIDEO, VIDEO, VIDEO),
        "predict masked words": lambda: model.masked_language_logits(VIDEO, VIDEO, VIDEO),
        "answer": lambda: model.answer(VIDEO, ["what"], ["a", "b"]),
        "read text": lambda: model.unknown_words("a"),
    }
    for what, call in calls.items():
        with pytest.raises(CapabilityError, match=f"of kind '{kind}' cannot {what}"):
            call()


def test_a_wrong_number_of_frames_is_refused(models):
    with pytest.raises(ValueError, match="takes 4 frames"):
        models["classifier"](VIDEO[:, :3])
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        ClassifierConfig(num_classes=0)


def test_a_head_reads_the_class_token_or_the_mean_of_the_others():
    torch.manual_seed(0)
    published = Classifier(ClassifierConfig(vision=VISION, num_classes=5)).eval()
    other = Classifier(ClassifierConfig(vision=VISION, num_classes=5, reads="mean")).eval()
    other.load_state_dict(published.state_dict())
    video = torch.randn_like(VIDEO)
    tokens = published.vision_encoder(video).tokens
    head = published.head
    torch.testing.assert_close(published(video), tokens[:, 0] @ head.weight.T + head.bias)
    expected = torch.stack([clip[1:].sum(0) / 64 for clip in tokens]) @ head.weight.T + head.bias
    torch.testing.assert_close(other(video), expected)
    with pytest.raises(ValueError, match="reads must be 'cls' or 'mean', got 'all'"):
        ClassifierConfig(reads="all")
