"""Text from audio and text: sampling, the prefill and decode loop, batches of prompts, and the API.

prompts -> right-padded batch -> prefill -> decode until every row has ended -> token ids.
"""
