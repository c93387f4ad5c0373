"""The server: the engine behind OpenAI's and Anthropic's HTTP interfaces, and a page to chat on.

What a reader should start with: `app.create_app` puts the routes together, `protocol` says what a request may hold,
`jobs` follows the engine's sequences from the event loop, `answers` turns tokens into reasoning, text and tool calls.
"""
