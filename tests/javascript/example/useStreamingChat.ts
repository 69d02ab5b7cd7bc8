import { useState } from 'react'

export function useStreamingChat() {
  const [response, setResponse] = useState('')
  const [isStreaming, setIsStreaming] = useState(false)

  const sendMessage = async (message: string) => {
    setIsStreaming(true)
    setResponse('')

    const res = await fetch('http://localhost:3000/chat/stream', {
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify({ message })
    })

    const reader = res.body!.getReader()
    const decoder = new TextDecoder()

    while (true) {
      const { done, value } = await reader.read()
      if (done) break

      const chunk = decoder.decode(value)
      const lines = chunk.split('\n\n')

      for (const line of lines) {
        if (line.startsWith('data: ')) {
          const data = JSON.parse(line.slice(6))

          if (data.done) {
            setIsStreaming(false)
          } else if (data.token) {
            setResponse(prev => prev + data.token)
          }
        }
      }
    }
  }

  return { response, isStreaming, sendMessage }
}
