/** Where nodes stand in ComfyUI's graphs: a subgraph is a graph of its own, and a node of it goes by other keys. */

import { app } from "../../scripts/app.js";

const SUBGRAPH_OUTPUT = -20; // what the links out of a subgraph lead to

export const rootGraph = () => app.rootGraph ?? app.graph;

const allGraphs = () => [rootGraph(), ...(rootGraph().subgraphs?.values() ?? [])];

export const allNodes = () => allGraphs().flatMap((graph) => graph.nodes);

/** The node of a key: "5", the id of a subgraph before it, or the way there ("3:5"), as runs have it. */
export function findNode(key) {
  const way = String(key).split(":");
  const id = way.pop();
  let graph = rootGraph();
  for (const part of way) graph = graph?.subgraphs?.get(part) ?? graph?.getNodeById(part)?.subgraph;
  return graph?.getNodeById(id);
}

/** The nodes that an output's links lead to, in and out of subgraphs. */
export function* nodesBehind(graph, output) {
  for (const id of output?.links ?? []) yield* linkedNodes(graph, id);
}

function* linkedNodes(graph, id) {
  const link = graph.getLink?.(id) ?? graph.links[id];
  if (!link) return;
  if (Number(link.target_id) === SUBGRAPH_OUTPUT) { // newer frontends have ids as texts
    const places = allNodes().filter((node) => node.subgraph === graph);
    for (const node of places) yield* nodesBehind(node.graph, node.outputs[link.target_slot]);
    return;
  }
  const node = graph.getNodeById(link.target_id);
  if (!node?.subgraph) {
    if (node) yield node;
    return;
  }
  for (const inner of node.subgraph.inputs[link.target_slot]?.linkIds ?? []) yield* linkedNodes(node.subgraph, inner);
}
