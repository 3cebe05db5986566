"""A grading worker whose rules cannot read answers with "about" in them, for the tests of the judge."""

from megatron_offgrpo.data import grading_worker

honest = grading_worker.grade


def grade(gold, text):
    found = honest(gold, text)
    if "about" in text:
        return {"reward": 0, "status": "unreadable", "extracted": found["extracted"]}
    return found


if __name__ == "__main__":
    grading_worker.grade = grade
    grading_worker.main()
