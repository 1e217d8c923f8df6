"""Chat messages to one prompt, by the template that comes with a checkpoint.

Templates are Jinja programs written for Hugging Face transformers; the environment here offers
what they expect there. They are sandboxed: a checkpoint may come from anywhere.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn, cast

from shared.errors import ConfigInvalid, Rejected

ChatMessage = Mapping[str, Any]
"""``role`` and ``content``, as in OpenAI's API."""

BUILT_IN_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'] }}: {{ message['content'] }}
{% endfor -%}
{%- if add_generation_prompt -%}
assistant: {% endif -%}
"""


class ChatTemplate:
    """A compiled template and the special tokens that it may name (``bos_token``, ...)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ConfigInvalid when ``source`` is not a template."""
        from jinja2 import TemplateError  # noqa: PLC0415  # only who renders chats pays for it

        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ConfigInvalid(
                field="chat_template", value=source[:80], remedy=f"not a Jinja template: {error}"
            ) from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str:
        """The prompt; raises Rejected("invalid") when the template refuses the messages."""
        from jinja2 import TemplateError  # noqa: PLC0415

        try:
            return self._template.render(
                self._special_tokens,
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
            )
        except TemplateError as error:
            detail = f"the model's chat template refuses these messages: {error.message or error}"
            raise Rejected("invalid", detail) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            # A template is a program: what it does to messages it did not expect can fail
            # like any other program.
            detail = f"the model's chat template fails on these messages: {error!r}"
            raise Rejected("invalid", detail) from error


def _environment() -> Any:  # noqa: ANN401  # jinja2 is imported late
    from jinja2 import nodes  # noqa: PLC0415
    from jinja2.ext import Extension, loopcontrols  # noqa: PLC0415
    from jinja2.parser import Parser  # noqa: PLC0415
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    class GenerationBlock(Extension):
        """``{% generation %}`` marks what the assistant said, for training; here it only groups."""

        tags = {"generation"}  # noqa: RUF012  # jinja2's own attribute

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    names = cast("dict[str, Any]", environment.globals)  # jinja2 types it by its built-in values
    names["raise_exception"] = _raise_exception
    names["strftime_now"] = _strftime_now
    return environment


def _to_json(value: object, indent: int | None = None, **options: Any) -> str:  # noqa: ANN401  # json's options
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError  # noqa: PLC0415

    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    """The date for templates that state it; UTC, so that every ingress states the same."""
    return datetime.now(tz=UTC).strftime(form)
