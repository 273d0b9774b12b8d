// The tokenizers: characters, words, and byte-level byte-pair encoding (BPE), which includes GPT-2's. They give the same ids,
// texts and error messages as MyGPT/tokenizers in Python. inside/live.py writes the data from which they are built.

// JavaScript's \s matches other characters than \s in Rust and in Python, so white space is listed: Unicode's White_Space,
// and Python's, which includes four control characters.
const WHITE_SPACE = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const PYTHON_SPACE = WHITE_SPACE + "\\x1c-\\x1f";

function makeTokenizer(data) {
  return new { chars: CharTokenizer, words: WordTokenizer, bpe: BPETokenizer }[data.kind](data);
}

// ---- Special tokens and other added tokens, which are found in a text as a whole ----

class AddedTokens {
  constructor(tokens) {
    // Tokens that are not `normalized` are found first, and the others in the rest of the text. The longest token wins.
    this.groups = [false, true].map(normalized => {
      const group = new Map(tokens.filter(token => token.normalized === normalized).map(token => [token.content, token]));
      const longestFirst = [...group.keys()].sort((one, other) => [...other].length - [...one].length);
      return { group, pattern: new RegExp(longestFirst.map(escapeRegExp).join("|") || "(?!)", "gu") };
    });
  }

  // Return the added tokens in a text (objects), and the texts before, between and after them (strings), in order.
  split(text) {
    let parts = [text];
    for (const { group, pattern } of this.groups)
      parts = parts.flatMap(part => typeof part === "string" ? findTokens(part, group, pattern) : [part]);
    return parts.filter(part => part !== "");
  }
}

function findTokens(text, tokens, pattern) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    const token = tokens.get(match[0]);
    let start = match.index, stop = start + match[0].length;
    if (token.single_word && (/[\p{L}\p{N}_]$/u.test(text.slice(0, start)) || /^[\p{L}\p{N}_]/u.test(text.slice(stop)))) continue;
    if (token.lstrip) start = end + trimEnd(text.slice(end, start)).length;
    if (token.rstrip) stop = text.length - trimStart(text.slice(stop)).length;
    parts.push(text.slice(end, start), token);
    end = stop;
  }
  return [...parts, text.slice(end)];
}

const escapeRegExp = text => text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
const trimStart = text => text.replace(new RegExp(`^[${WHITE_SPACE}]+`, "u"), "");
const trimEnd = text => {
  let end = text.length;
  while (end > 0 && new RegExp(`[${WHITE_SPACE}]`, "u").test(text[end - 1])) end--;
  return text.slice(0, end);
};

// ---- What all tokenizers share ----

class Tokenizer {
  constructor({ added }) {
    this.added = new AddedTokens(added);
  }

  // Return the token ids of a text. An added token in the text, such as <|endoftext|>, becomes a single id.
  encode(text) {
    return this.added.split(text).flatMap(part => typeof part === "string" ? this.encodePart(part, text) : [part.id]);
  }

  // Return the text with which the page shows a token: · for a space, ↵ for a line end, \xe2 for a part of a character.
  label(id) {
    return this.has(id) ? visible(this.tokenText(id)) : `<id ${id}>`;
  }

  tokenText(id) {
    return this.decode([id]);
  }

  // Return the text that `id` adds to the text of `ids`. An incomplete character is held back until it is complete.
  textAfter(ids, id) {
    const whole = text => text.replace(/\ufffd+$/, "");
    const before = whole(this.decode(ids)), after = whole(this.decode([...ids, id]));
    return after.startsWith(before) ? after.slice(before.length) : "";
  }
}

// Characters and words: a Map from tokens to ids and one from ids to tokens.
class VocabularyTokenizer extends Tokenizer {
  constructor(data) {
    super(data);
    this.idOf = new Map(data.tokens);
    for (const { content, id } of data.added) this.idOf.set(content, id);
    this.tokenOf = new Map([...this.idOf].map(([token, id]) => [id, token]));
    this.size = Math.max(...this.tokenOf.keys()) + 1;
  }

  has(id) {
    return this.tokenOf.has(id);
  }

  tokens(ids) {
    return ids.filter(id => this.has(id)).map(id => this.tokenOf.get(id));
  }
}

class CharTokenizer extends VocabularyTokenizer {
  constructor(data) {
    super(data);
    this.characters = new Map(data.tokens);
  }

  encodePart(part, text) {
    return Array.from(part, character => {
      if (this.characters.has(character)) return this.characters.get(character);
      const place = `${quote(character)} at position ${[...text].indexOf(character)}`;
      throw new Error(`character ${place} is not in the vocabulary of ${this.size} characters`);
    });
  }

  decode(ids) {
    return this.tokens(ids).join("");
  }
}

const UNKNOWN = "<|unk|>";
const WORD_SPLIT = new RegExp(`([,.:;?_!"()']|--|[${PYTHON_SPACE}])`, "u");
const SPACE_BEFORE_PUNCTUATION = new RegExp(`[${PYTHON_SPACE}]+([,.:;?!"()'])`, "gu");
const ONLY_SPACE = new RegExp(`^[${PYTHON_SPACE}]*$`, "u");

class WordTokenizer extends VocabularyTokenizer {
  encodePart(part) {
    return part.split(WORD_SPLIT).filter(word => !ONLY_SPACE.test(word)).map(word => {
      const id = this.idOf.get(word) ?? this.idOf.get(UNKNOWN);
      if (id !== undefined) return id;
      throw new Error(`${quote(word)} is not in the vocabulary of ${this.size} tokens, which has no ${UNKNOWN}`);
    });
  }

  decode(ids) {
    return this.tokens(ids).join(" ").replace(SPACE_BEFORE_PUNCTUATION, "$1");
  }
}

// ---- Byte-level BPE ----

// GPT-2's pattern splits a text into words with their leading space, numbers, punctuation and white space. Merges never
// cross the border of such a chunk. `newer` has the letters and numbers that Python's tokenizer does not know, because they
// are from a newer version of Unicode than its own. The browser may know them.
function gpt2Pattern(newer) {
  const letter = `(?:(?![${newer}])\\p{L})`, number = `(?:(?![${newer}])\\p{N})`, space = `[${WHITE_SPACE}]`;
  const other = `(?:[^${WHITE_SPACE}\\p{L}\\p{N}]|[${newer}])`, notSpace = `[^${WHITE_SPACE}]`;
  const contraction = "'(?:[sdmt]|ll|ve|re)";
  return new RegExp(`${contraction}| ?${letter}+| ?${number}+| ?${other}+|${space}+(?!${notSpace})|${space}`, "gu");
}

const MAX_REMEMBERED = 10000; // chunks whose ids are kept, so that typing encodes only the new word

class BPETokenizer extends Tokenizer {
  // Tokens have two numbers: the id that the model reads, and an index. Index i < 256 is byte i, and index 256 + i is the
  // result of merge i, a pair of indices. The merge with the smallest index is applied first.
  constructor(data) {
    super(data);
    this.pattern = gpt2Pattern(data.newer);
    const pairs = wholeNumbers(data.merges, data.merge_bytes);
    this.first = pairs.filter((_, i) => i % 2 === 0);
    this.second = pairs.filter((_, i) => i % 2 === 1);
    const n = this.n = 256 + this.first.length;
    this.merged = new Map(Array.from(this.first, (first, i) => [first * n + this.second[i], 256 + i]));
    this.idOf = [...data.bytes, ...(data.ids ?? Array.from(this.first, (_, i) => 256 + i))];
    this.indexOf = new Map(this.idOf.map((id, index) => [id, index]));
    this.others = new Map(data.added.map(({ content, id }) => [id, new TextEncoder().encode(content)]));
    for (const [id, bytes] of data.unmerged) this.others.set(id, Uint8Array.from(bytes));
    this.remembered = new Map();
  }

  has(id) {
    return this.indexOf.has(id) || this.others.has(id);
  }

  encode(text) {
    const half = /\p{Cs}/u.exec(text);
    if (half) {
      const code = half[0].charCodeAt(0).toString(16).toUpperCase(), place = [...text.slice(0, half.index)].length;
      const reason = "half of a character, which UTF-8 cannot represent";
      throw new Error(`the text contains the lone surrogate U+${code} at position ${place}, ${reason}`);
    }
    return super.encode(text);
  }

  encodePart(part) {
    return (part.match(this.pattern) ?? []).flatMap(chunk => {
      if (!this.remembered.has(chunk)) {
        if (this.remembered.size >= MAX_REMEMBERED) this.remembered.clear();
        this.remembered.set(chunk, this.merge([...new TextEncoder().encode(chunk)]).map(index => this.idOf[index]));
      }
      return this.remembered.get(chunk);
    });
  }

  // Join pairs of adjacent tokens, given as indices, until no pair can be joined. All pairs with the smallest index are
  // joined in one pass, from left to right.
  merge(tokens) {
    const joined = i => this.merged.get(tokens[i] * this.n + tokens[i + 1]) ?? Infinity;
    for (;;) {
      let best = Infinity;
      for (let i = 0; i + 1 < tokens.length; i++) best = Math.min(best, joined(i));
      if (best === Infinity) return tokens;
      const shorter = [];
      for (let i = 0; i < tokens.length; i++) {
        const isPair = i + 1 < tokens.length && joined(i) === best;
        shorter.push(isPair ? best : tokens[i]);
        if (isPair) i++;
      }
      tokens = shorter;
    }
  }

  // Return the bytes of a token. A merged token has the bytes of its two parts.
  bytes(id) {
    if (!this.indexOf.has(id)) return [...(this.others.get(id) ?? [])];
    const waiting = [this.indexOf.get(id)], bytes = [];
    while (waiting.length) {
      const index = waiting.pop();
      if (index < 256) bytes.push(index);
      else waiting.push(this.second[index - 256], this.first[index - 256]);
    }
    return bytes;
  }

  decode(ids) {
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(ids.flatMap(id => this.bytes(id))));
  }

  tokenText(id) {
    return decodeWithEscapes(this.bytes(id));
  }
}

// Decode numbers of 2 or 4 bytes each, written in base64.
function wholeNumbers(base64, size) {
  const { buffer } = bytesOf(base64);
  return size === 2 ? new Uint16Array(buffer) : new Uint32Array(buffer);
}

// Decode UTF-8. A byte that belongs to no whole character becomes an escape such as \xe2.
function decodeWithEscapes(bytes) {
  const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  let text = "";
  for (let i = 0; i < bytes.length;) {
    const size = bytes[i] < 0x80 ? 1 : bytes[i] < 0xe0 ? 2 : bytes[i] < 0xf0 ? 3 : 4;
    try {
      text += decoder.decode(Uint8Array.from(bytes.slice(i, i + size)));
      i += size;
    } catch {
      text += "\\x" + bytes[i++].toString(16).padStart(2, "0");
    }
  }
  return text;
}

// ---- Showing characters ----

const MARKS = { " ": "·", "\n": "↵", "\r": "←", "\t": "⇥" };
const PRINTABLE = /^[\p{L}\p{M}\p{N}\p{P}\p{S} ]$/u;

function visible(text) {
  return Array.from(text, character => MARKS[character] ?? escaped(character)).join("");
}

// Return the character, or an escape such as \u2028 if it cannot be seen.
function escaped(character) {
  if (PRINTABLE.test(character)) return character;
  const code = character.codePointAt(0), hex = n => code.toString(16).padStart(n, "0");
  return code < 0x100 ? `\\x${hex(2)}` : code < 0x10000 ? `\\u${hex(4)}` : `\\U${hex(8)}`;
}

// Return a text in quotes as Python writes it in its messages.
function quote(text) {
  const mark = text.includes("'") && !text.includes('"') ? '"' : "'";
  const special = { "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", [mark]: "\\" + mark };
  return mark + Array.from(text, character => special[character] ?? escaped(character)).join("") + mark;
}
