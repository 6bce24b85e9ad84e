// The page of hiar_jax.serve: sends commands, plays the video that comes back by Media Source
// Extensions, and shows the status. Messages are described in serving/app.py.

const $ = (id) => document.getElementById(id);
const video = $("video");
const KEPT_SECONDS = 60; // of video behind the play head; browsers limit a buffer's bytes
const MAX_MEGABYTES = 15; // of an uploaded file; the server takes 1 MB more, for the command

let socket = null;
let player = null; // of the video that is played
let status = { state: "connecting" };
// Times are milliseconds of performance.now().
let pendingStart = 0; // when Start was pressed, until its video begins
let startedAt = 0; // when Start was pressed for the video that is played
let prompts = new Map(); // of that video: second -> prompt; a status holds only the last ones
let latency = null; // seconds from pressing Start to the first frame on the screen
let pausedByHand = false;
let lastRemarks = ""; // of the model about the prompt

// ----------------------------------------------------------------------------------------- playing

// Appends the pieces of a fragmented mp4 to the video element's buffer, one at a time.
class Player {
  constructor(mime) {
    this.queue = [];
    this.source = new MediaSource();
    this.url = URL.createObjectURL(this.source);
    video.src = this.url;
    this.source.addEventListener(
      "sourceopen",
      () => {
        this.buffer = this.source.addSourceBuffer(mime);
        this.buffer.addEventListener("updateend", () => this.feed());
        this.feed();
      },
      { once: true },
    );
    video.requestVideoFrameCallback?.(() => {
      latency = (performance.now() - startedAt) / 1000;
      $("curtain").hidden = true;
    });
    video.play().catch(() => {}); // refused while the tab has never been clicked; feed() retries
  }

  add(bytes) {
    this.queue.push(bytes);
    this.feed();
  }

  feed() {
    const buffer = this.buffer;
    // while it is updating it takes nothing; "updateend" calls again
    if (!buffer || buffer.updating || this.source.readyState === "closed") return;
    const start = buffer.buffered.length ? buffer.buffered.start(0) : 0;
    if (video.currentTime - start > 2 * KEPT_SECONDS) {
      buffer.remove(start, video.currentTime - KEPT_SECONDS);
    } else if (this.queue.length) {
      try {
        buffer.appendBuffer(this.queue[0]);
        this.queue.shift();
      } catch (error) {
        if (error.name !== "QuotaExceededError") throw error;
        // full: drop all but the last second that was played, and append after "updateend"
        buffer.remove(start, Math.max(start + 0.01, video.currentTime - 1));
      }
    }
    if (!pausedByHand && video.paused && this.seconds() > video.currentTime)
      video.play().catch(() => {});
  }

  // The end of what is buffered.
  seconds() {
    const ranges = this.buffer ? this.buffer.buffered : { length: 0 };
    return ranges.length ? ranges.end(ranges.length - 1) : 0;
  }

  close() {
    URL.revokeObjectURL(this.url);
  }
}

// ---------------------------------------------------------------------------------------- messages

function connect() {
  socket = new WebSocket(
    `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/watch`,
  );
  socket.binaryType = "arraybuffer";
  socket.onmessage = (event) => {
    if (typeof event.data === "string") receive(JSON.parse(event.data));
    else player?.add(event.data);
  };
  socket.onclose = () => {
    socket = null;
    showStatus({ state: "disconnected" });
    setTimeout(connect, 2000); // milliseconds
  };
}

// Sends a command, with a file behind it in one binary message.
function send(command, file = null) {
  if (socket?.readyState !== WebSocket.OPEN) return showMessage("The server is not there.");
  const text = JSON.stringify(command);
  socket.send(file ? new Blob([text, "\n", file]) : text);
}

function receive(message) {
  if (message.say === "status") return showStatus(message);
  if (message.say === "refused") return showMessage(message.why);
  if (message.say === "prompt")
    return showMessage(`Block ${message.block} will be the first to show it.`);
  if (message.say === "given") return showMessage(message.done);
  if (message.say === "begin") {
    clearVideo();
    $("download").href = message.clip;
    $("download").hidden = false;
    if (!window.MediaSource?.isTypeSupported(message.mime))
      return showMessage(
        `This browser does not play ${message.mime}; download the video instead.`,
      );
    player = new Player(message.mime);
  }
}

// Makes room for the next video. Called when it begins, not when Start is pressed: the server may
// refuse the request, and then the video that is played goes on.
function clearVideo() {
  if (pendingStart) {
    startedAt = pendingStart;
    pendingStart = 0;
    latency = null;
    pausedByHand = false;
  }
  prompts = new Map();
  player?.close();
  player = null;
  $("caption").textContent = "";
  video.removeAttribute("src");
  video.load();
}

// ------------------------------------------------------------------------------------------ status

const showMessage = (text) => {
  $("message").textContent = text;
};
const number = (value, digits = 1) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
// A colour for each prompt, the same on the strip and in the table.
const hue = (text) => [...text].reduce((sum, char) => (sum * 31 + char.codePointAt(0)) % 360, 7);
const chip = (text) => `hsl(${hue(text)} 60% 50%)`;

const STATES = {
  idle: () => "ready",
  connecting: () => "connecting",
  disconnected: () => "the server is not there; trying again",
  waiting: (s) => {
    const others = s.max_generations === 1 ? "Another video is" : `${s.max_generations} other videos are`;
    return `${others} being made; ${s.before ? `${s.before} before you` : "you are next"}`;
  },
  starting: () => "starting",
  running: () => "making",
  paused: () => "paused",
  finished: () => "finished: extend it, or start another one",
  ended: (s) => `ended: ${s.why}`,
};

function showStatus(message) {
  status = message;
  const alive = ["starting", "running", "paused", "finished"].includes(status.state);
  $("state").textContent = STATES[status.state](status);
  $("state").className = status.state;
  $("change").disabled = !(alive && status.state !== "starting");
  $("pause").disabled = !alive || status.state === "finished";
  $("pause").textContent = status.state === "paused" ? "Resume" : "Pause";
  $("extend").disabled = !(alive && status.target !== null);
  $("stop").disabled = !(alive || status.state === "waiting");
  if (["waiting", "starting"].includes(status.state)) {
    if (player || pendingStart) clearVideo();
    $("curtain").hidden = false;
    $("curtain").textContent = STATES[status.state](status);
  }
  if ("levels" in status) showSession();
}

// The figures, the strip and the table of a session.
function showSession() {
  const length = status.target === null ? "" : ` of ${number(status.target)}`;
  $("latency").textContent = latency === null ? "–" : `${number(latency, 2)} s`;
  $("latency").title = status.latency === null ? "" : `made after ${number(status.latency, 2)} s`;
  $("speed").textContent =
    status.speed === null
      ? "–"
      : `${number(status.speed)} frames/s, plays ${number(status.fps, status.fps % 1 ? 1 : 0)}`;
  $("made").textContent = `${number(status.seconds)}${length} s`;
  $("blocks").textContent = status.blocks;
  for (const [second, prompt] of status.prompts) prompts.set(second, prompt);
  showStrip();
  const remarks = status.remarks.join(" ");
  // once: a later message must not be replaced by the same remarks in each status
  if (remarks && remarks !== lastRemarks) showMessage(remarks);
  lastRemarks = remarks;
  const rows = status.levels.map((level, i) => [
    `noise ${number(level.sigma, 2)}`,
    level.block,
    level.prompt,
    i ? "empty" : "next block", // level 0 is where a block enters
  ]);
  const made = status.prompts.at(-1);
  rows.push(
    made
      ? ["finished", status.blocks - 1, made[1], "", "finished"]
      : ["finished", null, null, "nothing yet"],
  );
  while ($("levels").children.length < rows.length) $("levels").append(newRow());
  rows.forEach((row, i) => fillRow($("levels").children[i], ...row));
}

// Seconds that the strip stands for.
const span = () => Math.max(status.target ?? 0, status.seconds ?? 0) || 1;

// The strip: what was made, a part for each prompt.
function showStrip() {
  const starts = [...prompts.keys()];
  $("strip").hidden = !starts.length;
  $("parts").replaceChildren(
    ...starts.map((start, i) => {
      const part = document.createElement("i");
      part.title = prompts.get(start);
      part.style.left = `${(100 * start) / span()}%`;
      part.style.width = `${(100 * ((starts[i + 1] ?? status.seconds) - start)) / span()}%`;
      part.style.setProperty("--chip", chip(prompts.get(start)));
      return part;
    }),
  );
}

function newRow() {
  const item = document.createElement("li");
  for (const column of ["level", "block", "prompt"]) {
    const cell = document.createElement("span");
    cell.className = column;
    item.append(cell);
  }
  return item;
}

// Fills a row of the table; `placeholder` stands for the prompt where there is no block.
function fillRow(item, name, block, prompt, placeholder, kind = "") {
  const [level, number, text] = item.children;
  item.className = block === null ? "empty" : kind;
  level.textContent = name;
  number.textContent = block ?? "";
  text.textContent = block === null ? placeholder : prompt || "(no prompt)";
  if (block !== null) text.style.setProperty("--chip", chip(prompt));
}

// ---------------------------------------------------------------------------------------- controls

function pause(wanted) {
  pausedByHand = wanted;
  if (wanted) video.pause();
  else video.play().catch(() => {});
  send({ do: wanted ? "pause" : "go" });
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const file = $("given").files[0];
  const length = $("length").value;
  if (file?.size > MAX_MEGABYTES * 2 ** 20) {
    const size = number(file.size / 2 ** 20);
    return showMessage(`${file.name} has ${size} MB; at most ${MAX_MEGABYTES} can be sent.`);
  }
  showMessage(file ? `Sending ${file.name}.` : "");
  pendingStart = performance.now();
  const command = {
    do: "start",
    prompt: $("prompt").value,
    seed: Number($("seed").value),
    seconds: length ? Number(length) : null,
  };
  if (file) send({ ...command, name: file.name }, file);
  else send(command);
});
$("given").onchange = () => {
  $("nothing").hidden = !$("given").files.length;
};
$("nothing").onclick = () => {
  $("given").value = "";
  $("nothing").hidden = true;
};
$("full").onclick = () =>
  document.fullscreenElement ? document.exitFullscreen() : $("screen").requestFullscreen();
$("strip").onclick = (event) => {
  const { left, width } = $("strip").getBoundingClientRect();
  const kept = player?.buffer?.buffered;
  if (!kept?.length) return;
  // to what is still buffered; 0.05 s before its end, where there is a frame to show
  const second = (span() * (event.clientX - left)) / width;
  video.currentTime = Math.min(Math.max(second, kept.start(0)), kept.end(kept.length - 1) - 0.05);
};
$("change").onclick = () =>
  send({ do: "prompt", prompt: $("prompt").value, recache: $("recache").checked });
$("pause").onclick = () => pause(status.state !== "paused");
$("extend").onclick = () => send({ do: "extend", seconds: 10 });
$("stop").onclick = () => send({ do: "stop" });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if ($("change").disabled) $("form").requestSubmit();
  else $("change").click();
});

// A hidden tab does not play, so its generation is paused until it is seen again.
document.addEventListener("visibilitychange", () => {
  if (["starting", "running"].includes(status.state) && document.hidden) {
    pause(true);
    pausedByHand = false;
  } else if (status.state === "paused" && !document.hidden && !pausedByHand) pause(false);
});

setInterval(() => {
  if (!player) return;
  $("watched").textContent = `${number(video.currentTime)} s`;
  $("caption").textContent =
    [...prompts].findLast(([second]) => second <= video.currentTime)?.[1] ?? "";
  $("head").style.left = `${100 * Math.min(1, video.currentTime / span())}%`;
  if (socket?.readyState === WebSocket.OPEN)
    socket.send(JSON.stringify({ do: "at", seconds: video.currentTime }));
}, 250); // milliseconds; the server makes a few seconds more than the last "at"

connect();
