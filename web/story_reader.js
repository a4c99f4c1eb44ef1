/** Puts a story reader into the view and save nodes; it grows while the graph runs. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { StoryReader } from "./story_pages.js";

const READERS = ["MiniGPT5ViewStory", "MiniGPT5SaveStory"];
const STORY = "MINIGPT5_STORY";
const TEXT_WIDGET = "$$node-text-preview"; // ComfyUI's own, for browsers without this file

const style = document.createElement("link");
style.rel = "stylesheet";
style.href = new URL("./story_reader.css", import.meta.url).href;
document.head.append(style);

const pictureUrl = (file) => api.apiURL(`/view?${new URLSearchParams(file)}`);

const locale = () => app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";

/** Shows the pages in the node's reader and in all that the story flows to. */
function show(node, pages, seen = new Set()) {
  if (seen.has(node)) return;
  seen.add(node);
  node.storyReader?.show(pages);
  node.outputs?.forEach((output, slot) => {
    if (output.type !== STORY && output.type !== "*") return; // "*": a reroute
    for (const target of node.getOutputNodes(slot) ?? []) {
      const input = target.inputs?.some((input) => input.type === STORY || input.type === "*");
      if (input) show(target, pages, seen);
    }
  });
}

function removeWidget(node, name) {
  const index = node.widgets?.findIndex((widget) => widget.name === name) ?? -1;
  if (index < 0) return;
  node.widgets[index].onRemove?.();
  node.widgets.splice(index, 1);
}

function addReader(node) {
  node.storyReader = new StoryReader(pictureUrl, locale());
  const widget = node.addDOMWidget("story_reader", "minigpt5_story", node.storyReader.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => 200,
  });
  widget.serialize = false; // saved workflows hold the node's inputs, nothing of ours
  const [width, height] = node.size;
  node.setSize([Math.max(width, 360), Math.max(height, 480)]);
}

app.registerExtension({
  name: "MiniGPT5.StoryReader",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name?.startsWith("MiniGPT5")) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      if (this.storyReader) {
        delete output?.images; // the reader shows them, so ComfyUI's preview need not
        removeWidget(this, TEXT_WIDGET);
      }
      onExecuted?.call(this, output);
      if (output?.minigpt5_pages) show(this, output.minigpt5_pages);
    };
  },

  nodeCreated(node) {
    if (READERS.includes(node.comfyClass)) addReader(node);
  },

  /** A workflow opened from the queue's history brings its outputs along. */
  loadedGraphNode(node) {
    const pages = app.nodeOutputs?.[node.id]?.minigpt5_pages;
    if (node.storyReader && pages) node.storyReader.show(pages);
  },
});
