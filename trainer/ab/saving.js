// Takes answers to the server, one at a time, so that none overtakes a later one, and again until each is on its disk.

export const RETRY = 1000; // milliseconds
export const TIMEOUT = 10000;

export class Saver {
  /** `tell` has `saved()`, `failed(reason)`, after which it is tried again, and `refused(reason)`, after which not. */
  constructor(tell) {
    this.tell = tell;
    this.unsaved = new Map();
    this.running = null;
  }

  save(answer) {
    this.unsaved.set(`${answer.pair} ${answer.question}`, answer);
    this.flush();
  }

  /** Done when nothing is unsaved. */
  flush() {
    this.running ??= this.drain().finally(() => (this.running = null));
    return this.running;
  }

  async drain() {
    while (this.unsaved.size) {
      const [key, answer] = this.unsaved.entries().next().value;
      const reply = await send(answer);
      if (reply.refused) {
        this.unsaved.clear();
        this.tell.refused(reply.reason);
      } else if (reply.saved) {
        if (this.unsaved.get(key) === answer) this.unsaved.delete(key);
        this.tell.saved();
      } else {
        this.tell.failed(reply.reason);
        await new Promise((resolve) => setTimeout(resolve, RETRY));
      }
    }
  }
}

async function send(answer) {
  try {
    const reply = await fetch("answer", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(answer),
      signal: AbortSignal.timeout(TIMEOUT),
    });
    const refused = reply.status >= 400 && reply.status < 500;
    return { saved: reply.ok, refused, reason: reply.ok ? "" : await reply.text() };
  } catch {
    return { saved: false, refused: false, reason: "the server does not answer." };
  }
}
