"""ComfyUI's web server, which notes what it is asked to send."""

from types import SimpleNamespace


def _send_progress_text(text: str, node_id: str, sid: str | None = None) -> None:
    sent.append((text, node_id, sid))


sent: list[tuple[str, str, str | None]] = []
PromptServer = SimpleNamespace(
    instance=SimpleNamespace(
        client_id="browser",
        send_progress_text=_send_progress_text,
        app=SimpleNamespace(on_response_prepare=[]),  # aiohttp's, called with every request and its answer
    )
)
