"""Conversations through a chat template, as pieces: what generation is handed, and what must follow.

template     one template: messages -> text, in the sandbox, on a fixed day
choice       which template: the tokenizer's, a built-in one, a file
stand_ins    conversations with their texts replaced, to see what a template does
turn_facts   what it writes around an answer, and which fields it shows: once per shape
stops        which tokens end an answer
thoughts     how it opens and closes thoughts
calls        arguments of tool calls as it wants them
align        where an answer begins when the rendered turn does not begin with its prompt
pieces       one (prompt, answer) per answer, from all of these
frame        what of a prompt may be cut, so that the rest is one still
chat_format  all templates of one tokenizer
"""
