/** Puts a story reader into the view and save nodes; it grows while the graph runs. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { allNodes, findNode, nodesBehind, rootGraph } from "./story_graph.js";
import { StoryReader } from "./story_pages.js";

const NOTED = ["MiniGPT5Interleaver", "MiniGPT5StoryTurn"]; // say what is to be said of the pages
const READERS = ["MiniGPT5ViewStory", "MiniGPT5SaveStory"];
const STORY = "MINIGPT5_STORY";
const RUNS_LOOKED_AT = 32; // of the server's history
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
  for (const output of node.outputs ?? []) {
    if (output.type !== STORY && output.type !== "*") continue; // "*": a reroute
    for (const target of nodesBehind(node.graph, output)) {
      const input = target.inputs?.some((input) => input.type === STORY || input.type === "*");
      if (input) show(target, pages, seen);
    }
  }
}

/** Puts a run's outputs back: what stories flowed through first, for the readers' own are what was shown last. */
function restore(outputs) {
  const found = Object.entries(outputs ?? {})
    .filter(([, output]) => output?.minigpt5_pages)
    .map(([key, output]) => [findNode(key), output])
    .filter(([node]) => node)
    .sort(([one], [other]) => Boolean(one.storyReader) - Boolean(other.storyReader));
  for (const [node, output] of found) {
    if (node.storyReader) delete output.images;
    show(node, output.minigpt5_pages);
  }
}

/** After a reload the browser knows no outputs: the workflow's newest run in the server's history is shown. */
async function recall() {
  const isEmpty = () => allNodes().some((node) => node.storyReader && !node.storyReader.pages.length);
  const { id } = rootGraph();
  if (!isEmpty() || !id) return;
  const answer = await api.fetchApi(`/history?max_items=${RUNS_LOOKED_AT}`);
  const runs = answer.ok ? Object.values(await answer.json()).reverse() : [];
  const run = runs.find((run) => run.prompt?.[3]?.extra_pnginfo?.workflow?.id === id);
  if (rootGraph().id !== id) return; // another workflow was opened in the meantime
  restore(app.nodeOutputs); // of the run that was asked for, in a frontend that does not say so
  if (run && isEmpty()) restore(run.outputs);
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
  node.hideOutputImages = true; // by the new rendering, beside the reader
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

  setup() {
    api.addEventListener("execution_start", () => {
      for (const node of allNodes()) if (NOTED.includes(node.comfyClass)) removeWidget(node, TEXT_WIDGET);
    });
  },

  nodeCreated(node) {
    if (READERS.includes(node.comfyClass)) addReader(node);
  },

  /** A workflow's tab is opened again, or a run of the history. */
  onNodeOutputsUpdated: restore,

  afterConfigureGraph() {
    restore(app.nodeOutputs); // older frontends bring a run's outputs along
    recall().catch(() => {}); // not waited for; without a server there is nothing to remember
  },
});
