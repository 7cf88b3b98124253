"""Small chat templates that do what widely used ones do to a conversation, one kind each."""

from __future__ import annotations

STRIPS_REASONING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<|user|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{% set words = m.content %}"
    "{% if '</think>' in words %}{% set words = words.split('</think>')[-1] %}{% endif %}"
    "{{ '<|assistant|>' + words + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)
"""Reasoning is cut from every turn, and the prompt opens it (distilled reasoning models)."""

DROPS_EARLIER_REASONING = (
    "{% set last = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{% set words = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in words %}"
    "{% set thought = words.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set words = words.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > last.user %}"
    "{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ words }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson"
    " + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
"""Only the turns behind the last question keep their reasoning (hybrid reasoning models)."""

SYSTEM_IN_LAST_QUESTION = (
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if system and loop.index0 == (messages | selectattr('role', 'equalto', 'user') | list | length) * 2"
    " - (1 if system else 2) %}{{ system + '\\n\\n' }}{% endif %}{{ m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
"""The system text stands in the last question only, and the prompt is the question's end."""

SYSTEM_UNTIL_ANSWERED = (
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system + '\\n\\n' if system and loop.last else '') + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
"""The system text stands in a question that is not answered yet, so in prompts alone."""

CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last and not add_generation_prompt %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
"""Channels, reasoning under `thinking`, and another terminator where the conversation ends."""

TEXT_ARGUMENTS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' + m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<|call|>' + call.function.name + '\\n```json\\n' + call.function.arguments + '\\n```' }}{% endfor %}"
    "{{ eos_token }}{% else %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Arguments of calls are put together with other text, so they have to be text."""

PARTS = (
    "{% for m in messages %}{{ m.role | capitalize + ': ' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""Contents are lists of parts; a string would be written as nothing."""

ALTERNATING = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim"
    " + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
"""No system turn, no tools, questions and answers in turn."""

PYTHON_ARGUMENTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<|call|>' + call.name + ' ' + call.arguments | string }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Calls without their wrapper, whose arguments are printed: objects would come out as Python writes them."""

CALLS_END_APART = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "{{ '<|eot_id|>' if m.tool_calls else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""A turn with a call ends with another token than an answer."""

EVERY = {
    "strips reasoning": STRIPS_REASONING,
    "drops earlier reasoning": DROPS_EARLIER_REASONING,
    "system in the last question": SYSTEM_IN_LAST_QUESTION,
    "system until answered": SYSTEM_UNTIL_ANSWERED,
    "channels": CHANNELS,
    "text arguments": TEXT_ARGUMENTS,
    "parts": PARTS,
    "alternating": ALTERNATING,
    "python arguments": PYTHON_ARGUMENTS,
    "calls end apart": CALLS_END_APART,
}
