"""Annotations of public benchmarks as they are published: captions, questions and moments."""

from vlm.data.annotations.benchmarks.captions import read_captions
from vlm.data.annotations.benchmarks.files import AnnotationFiles
from vlm.data.annotations.benchmarks.moments import read_moments
from vlm.data.annotations.benchmarks.questions import answer_coverage, read_answer_list, read_questions
from vlm.data.annotations.benchmarks.records import (
    Captioned,
    Moment,
    Question,
    Record,
    content_hash,
    video_key,
)
from vlm.data.annotations.benchmarks.unified import to_json
from vlm.data.annotations.benchmarks.video_folder import VideoFolder

__all__ = [
    "AnnotationFiles",
    "Captioned",
    "Moment",
    "Question",
    "Record",
    "VideoFolder",
    "answer_coverage",
    "content_hash",
    "read_answer_list",
    "read_captions",
    "read_moments",
    "read_questions",
    "to_json",
    "video_key",
]
