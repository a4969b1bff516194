import subprocess
import sys

BLOCKED = ("yaml", "tokenizers", "huggingface_hub", "tqdm", "av", "PIL", "webdataset", "faiss", "open_clip")

PROGRAM = f"""
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
import torch
from vlm.models import TextEncoderConfig, TokenBatch, VideoMambaConfig, VideoTextConfig, VideoTextModel

vision = VideoMambaConfig(width=16, depth=1, num_frames=2, image_size=16, patch_size=8, state_size=4)
text = TextEncoderConfig(vocabulary_size=9, width=8, num_layers=2, fusion_layer=1, num_heads=2,
                         intermediate_width=8, max_positions=8, vision_width=16)
model = VideoTextModel(VideoTextConfig(vision=vision, text=text, embedding_width=4)).eval()
with torch.inference_mode():
    videos = model.encode_video(torch.zeros(1, 2, 3, 16, 16))
    texts = model.encode_text(TokenBatch(torch.ones(1, 3).long(), torch.ones(1, 3).long()))
    print(tuple(model.match(videos.tokens, texts.tokens, texts.mask).shape))
"""


def test_models_run_with_torch_numpy_einops_and_safetensors_alone(root):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "VLM_SCAN_BACKEND": "chunked", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 2)"
