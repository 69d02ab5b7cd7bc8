// The example's React hook, unchanged, in a component that React renders; prints every state it was in.
import { createElement } from 'react'
import { create } from 'react-test-renderer'
import { useStreamingChat } from './example/useStreamingChat.ts'
import { tell } from './gateway.mjs'

const states = []
let send

function Chat() {
  const { response, isStreaming, sendMessage } = useStreamingChat()
  send = sendMessage
  states.push({ response, isStreaming })
  return null
}

// React renders when it likes, as in a browser; `act` would put all of a stream into one state.
async function until(condition) {
  for (let tries = 0; tries < 12000 && !condition(); tries++) await new Promise((next) => setTimeout(next, 5))
}

create(createElement(Chat))
await until(() => send !== undefined)
await send('hi')
await until(() => states.length > 1 && !states.at(-1).isStreaming)
tell(states)
