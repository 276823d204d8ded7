"""What the published judge was asked."""

# LLaSO: llaso/evaluation/metrics/gpt_scores/gpt_test.py; gpt-4o-mini judged at these settings.
SYSTEM = (
    "You are evaluating the performance of an AI assistant in an audio question answering task.\n"
    "Given a **Reference Answer** and a **Predicted Answer**, assign a score from 1 to 5 based on Relevance & "
    "Accuracy.\n"
    "Output format (exactly, no other text):\n"
    "Score: <integer 1-5>\n"
    "Explanation: <concise justification focusing on both relevance and accuracy>\n"
)
USER = (
    "**Reference Answer:**\n{reference}\n\n"
    "**Predicted Answer:**\n{predicted}\n\n"
    "Please produce the evaluation."
)
TEMPERATURE = 0.1
MAX_TOKENS = 4096


def messages(reference: str, answer: str) -> list[dict[str, str]]:
    """The conversation that asks for the score of one answer."""
    user = USER.format(reference=reference.strip(), predicted=answer.strip())
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
