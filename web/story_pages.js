/**
 * A story as DOM: a list of pages, and a reading view over the whole window.
 *
 * Texts and names only ever become text nodes and attributes, never markup: a story may say anything.
 */

const LABELS = {
  en: {
    story: "Story",
    empty: "Run the workflow to read the story here.",
    read: "Read",
    close: "Close",
    previous: "Previous page",
    next: "Next page",
    page: (number, count) => `Page ${number} of ${count}`,
    picture: (number) => `Picture of page ${number}`,
  },
  zh: {
    story: "故事",
    empty: "运行工作流后，可在此阅读故事。",
    read: "阅读",
    close: "关闭",
    previous: "上一页",
    next: "下一页",
    page: (number, count) => `第 ${number} 页，共 ${count} 页`,
    picture: (number) => `第 ${number} 页的插图`,
  },
};

function create(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function button(className, label, symbol, action) {
  const element = create("button", className, symbol ?? label);
  element.type = "button";
  element.title = label;
  element.setAttribute("aria-label", label);
  element.addEventListener("click", action);
  return element;
}

/** The story in a node: `element` is put into it, `show(pages)` fills it; pages are {text, picture: file or null, note}. */
export class StoryReader {
  constructor(pictureUrl, locale = "en") {
    this.pictureUrl = pictureUrl;
    this.labels = LABELS[locale.split("-")[0]] ?? LABELS.en;
    this.pages = [];
    this.element = this.build();
  }

  build() {
    const root = create("section", "minigpt5-reader");
    root.setAttribute("role", "region");
    root.setAttribute("aria-label", this.labels.story);
    this.readButton = button("minigpt5-read", this.labels.read, undefined, () => this.open(0));
    this.readButton.disabled = true;
    this.list = create("div", "minigpt5-pages");
    this.list.tabIndex = 0; // so that the keyboard can scroll it
    this.list.setAttribute("role", "log"); // what is added is read out
    this.list.append(create("p", "minigpt5-empty", this.labels.empty));
    // the canvas would zoom on the wheel and pan on the drag
    root.addEventListener("wheel", (event) => this.list.scrollHeight > this.list.clientHeight && event.stopPropagation());
    root.addEventListener("pointerdown", (event) => event.stopPropagation());
    root.append(this.readButton, this.list);
    return root;
  }

  /** Pages that stay as they were keep their elements, so that nothing flickers while the story grows. */
  show(pages) {
    const old = this.pages;
    this.pages = pages;
    if (!old.length) this.list.replaceChildren();
    pages.forEach((page, index) => {
      if (JSON.stringify(page) === JSON.stringify(old[index])) return;
      const element = this.page(page, index);
      if (index < old.length) this.list.children[index].replaceWith(element);
      else this.list.append(element);
    });
    while (this.list.children.length > pages.length) this.list.lastElementChild.remove();
    this.readButton.disabled = !pages.length;
    if (this.dialog?.open) this.turnTo(Math.min(this.current, pages.length - 1));
  }

  page(page, index) {
    const element = create("article", "minigpt5-page");
    element.setAttribute("aria-label", this.labels.page(index + 1, this.pages.length));
    element.append(...this.content(page, index));
    const picture = element.querySelector("img");
    picture?.addEventListener("click", () => this.open(index));
    return element;
  }

  /** The picture, if there is one, the text, and what is to be said of the page. */
  content(page, index) {
    const text = create("p", "minigpt5-text", page.text);
    text.dir = "auto"; // right-to-left scripts
    const notes = page.note ? [create("p", "minigpt5-note", page.note)] : [];
    if (!page.picture) return [text, ...notes];
    const picture = create("img", "minigpt5-picture");
    picture.src = this.pictureUrl(page.picture);
    picture.alt = this.labels.picture(index + 1);
    picture.draggable = false;
    return [picture, text, ...notes];
  }

  /** The reading view, at one page. */
  open(index) {
    if (!this.pages.length) return;
    this.dialog ??= this.buildDialog();
    if (!this.dialog.open) {
      document.body.append(this.dialog);
      this.dialog.showModal();
    }
    this.turnTo(index);
    this.nextButton.focus();
  }

  buildDialog() {
    const dialog = create("dialog", "minigpt5-reading");
    dialog.setAttribute("aria-label", this.labels.story);
    this.spread = create("div", "minigpt5-spread");
    this.spread.setAttribute("aria-live", "polite");
    this.spread.tabIndex = 0; // a long page scrolls by the keyboard too
    this.previousButton = button("minigpt5-turn", this.labels.previous, "‹", () => this.turnTo(this.current - 1));
    this.nextButton = button("minigpt5-turn", this.labels.next, "›", () => this.turnTo(this.current + 1));
    this.counter = create("span", "minigpt5-counter");
    const close = button("minigpt5-close", this.labels.close, "×", () => dialog.close());
    const bar = create("div", "minigpt5-bar");
    bar.append(this.previousButton, this.counter, this.nextButton);
    dialog.append(close, this.spread, bar);
    dialog.addEventListener("keydown", (event) => this.onKey(event));
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside the page
    dialog.addEventListener("close", () => {
      dialog.remove();
      this.readButton.focus();
    });
    return dialog;
  }

  onKey(event) {
    event.stopPropagation(); // ComfyUI's shortcuts are not meant here
    const to = {
      ArrowRight: this.current + 1,
      ArrowLeft: this.current - 1,
      PageDown: this.current + 1,
      PageUp: this.current - 1,
      Home: 0,
      End: this.pages.length - 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.turnTo(to);
  }

  turnTo(index) {
    this.current = Math.max(0, Math.min(index, this.pages.length - 1));
    const page = this.pages[this.current];
    this.spread.replaceChildren(...this.content(page, this.current));
    this.spread.scrollTop = 0;
    this.counter.textContent = this.labels.page(this.current + 1, this.pages.length);
    this.previousButton.setAttribute("aria-disabled", String(this.current === 0));
    this.nextButton.setAttribute("aria-disabled", String(this.current === this.pages.length - 1));
  }
}
